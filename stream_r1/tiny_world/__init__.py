"""How the tiny world's weights are made: autoencoder, teacher and student start, each a resumable command."""
