"""Does a run survive faults?"""
