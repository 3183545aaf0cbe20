"""`python -m cluster CONFIG [section.key=value …]`: what `ray job submit` runs."""

from cluster.cli import run_command

if __name__ == "__main__":
    run_command("train", "python -m cluster")
