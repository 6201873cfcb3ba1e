"""What scripts/launch_tpu and scripts/launch_slurm are made of; the standard library alone."""
