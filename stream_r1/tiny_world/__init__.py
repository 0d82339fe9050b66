"""How the tiny world's weights are made: VAE, teacher, student start, reward heads, each a resumable command."""
