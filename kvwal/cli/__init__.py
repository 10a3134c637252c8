"""The commands of the command line. They need click and rich; the library does not."""
