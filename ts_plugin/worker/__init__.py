"""The path of one worker: the launcher before it, the follower inside it, the read-back all the time."""
