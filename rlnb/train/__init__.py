"""The methods: settings, one loop for all of them, checks before it, and PPO."""
