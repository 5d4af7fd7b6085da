"""The command line: flags and printing only."""
