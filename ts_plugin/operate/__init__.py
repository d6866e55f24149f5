"""What a person runs and sees: the command ts-cores, the core map, the doctor."""
