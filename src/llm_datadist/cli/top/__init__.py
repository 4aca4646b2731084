"""The verb `top`: a live view of running clusters."""
