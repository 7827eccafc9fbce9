"""What can be asked on the command line? `main` runs a command; each command is one file in `commands`."""
