"""What a recipe will take on a given world: memory per GPU, time per step."""
