"""Models and adapters: loaded, sampled, merged, exported."""
