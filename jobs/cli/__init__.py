"""The command line: one declaration a command; each imports what it needs when it runs."""
