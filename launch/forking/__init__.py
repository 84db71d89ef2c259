"""How a rank becomes a process: forked here, or by an agent on another machine."""
