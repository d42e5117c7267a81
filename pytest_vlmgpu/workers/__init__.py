"""With pytest-xdist: the controller shares GPUs out, one worker loads each model, and ends with its controller."""
