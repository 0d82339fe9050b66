"""A live page: type a prompt, watch at once, change it while it runs.

`protocol` says what goes over the wire, `engine` runs the models, `room` is one stream and those who
watch it, `viewer` one of them, `app` the ASGI application, `client` talks to it from Python.
"""
