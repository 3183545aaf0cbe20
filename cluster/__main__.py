"""`python -m cluster CONFIG [section.key=value …]`: what `ray job submit` runs."""

from alignment.cli import run_command

if __name__ == "__main__":
    run_command("train", "python -m cluster")
