package server

import "github.com/distlock/distlock/internal/replica"

// What the command needs of backups: it makes a data directory without a
// server.
type (
	// RestoreConfig says how to begin a history from a backup.
	RestoreConfig = replica.RestoreConfig
	// RestoreResult says what was restored.
	RestoreResult = replica.RestoreResult
	// BackupInfo says what a backup is of.
	BackupInfo = replica.BackupInfo
)

// Restore makes a data directory of a backup.
var Restore = replica.Restore

// Recover makes a lone survivor's data directory a cluster of its own.
var Recover = replica.Recover

// BackupDirectory backs up a stopped server's data directory.
var BackupDirectory = replica.BackupDirectory

// CheckBackup reads a backup to its end and says what it is of.
var CheckBackup = replica.CheckBackup
