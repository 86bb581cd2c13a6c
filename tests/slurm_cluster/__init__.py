"""A real SLURM on this host, for tests: munge, slurmctld, and several nodes that are processes."""
