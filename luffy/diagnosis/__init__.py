"""What `luffy doctor` finds.

finding    what is said of one thing      software   versions that must go together, compiler
hardware   device, driver, memory, disks, caches
"""
