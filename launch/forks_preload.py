"""What a fork server imports first; see launch/forks.py."""

from launch.forks import preload

preload()
