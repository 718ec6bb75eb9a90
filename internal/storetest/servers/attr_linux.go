package servers

import "syscall"

// attr makes a server end with the test that started it, however that ends.
func attr(as *syscall.Credential) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: as, Pdeathsig: syscall.SIGTERM, Setpgid: true}
}
