"""Whether files hold what may lie in their place, and what is known to be damaged or lost."""
