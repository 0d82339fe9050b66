"""The ops inside other people's models.

`diffusers_attention`: an attention backend for any diffusers model, and block-causal or streaming
self-attention for its `WanTransformer3DModel`. `self_forcing`: the cache dictionaries of Self Forcing and of
what grew out of it. Neither imports what it adapts to before it is called.
"""
