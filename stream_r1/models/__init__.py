"""The networks: the causal student, the video autoencoder, the text encoders; and the formats of their weights."""
