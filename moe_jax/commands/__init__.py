"""What the subcommands of `moe-jax` do, one module a subject; the top of the package."""
