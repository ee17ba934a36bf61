"""From a prompt and a seed to a picture that knows its origin."""
