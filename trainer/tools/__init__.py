"""What is done with LoRA and checkpoint files after training: one file for each job."""
