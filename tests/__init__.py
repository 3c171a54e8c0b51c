"""The tests, laid out like the packages; a package, so that no other `tests` shadows it."""
