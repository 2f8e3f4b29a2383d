"""Small trained networks with data to compile and judge them, and recipes for public models.
"""
