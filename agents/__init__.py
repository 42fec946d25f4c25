"""What learns: one file per algorithm, their losses and advantages, rollouts, the training loop, evaluation."""
