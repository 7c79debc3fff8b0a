"""Fine-tuning with Transformers' Trainer: arguments, tasks, metrics, the join."""
