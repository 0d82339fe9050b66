"""Writing to disks that several processes use, and that processes may be killed on."""
