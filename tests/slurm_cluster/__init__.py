"""A real SLURM on this host, for tests: munge, slurmctld, accounting, and several nodes that are processes."""
