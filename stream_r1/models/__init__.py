"""The networks (causal student, video autoencoder, text encoders) and the formats of their weights."""
