"""Heart rate of one user: the files that hold it, the rows, and their mean by span of time."""
