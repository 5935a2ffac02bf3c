"""Both stages, their losses, and the loop that trains them."""
