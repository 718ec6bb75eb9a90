package server

// files is how the limit of open files is shared out: what clients and
// strangers may take leaves enough for the log, snapshots and members, which
// must be able to go on whatever connects.
type files struct {
	connections int // of clients
	strangers   int // on the peer port, which have not said who they are
	metrics     int // connections that scrape
}

// shareFiles reads the limit; Go has raised it to the hard one at the start.
func shareFiles() files {
	return share(openFiles())
}

func share(limit int) files {
	aside := min(max(limit/3, 56), 1024)
	return files{
		connections: max(limit-aside, 1),
		strangers:   min(max(limit/10, 8), 256),
		metrics:     min(max(limit/32, 4), 64),
	}
}
