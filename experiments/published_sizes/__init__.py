"""Do published parameter counts agree with the arithmetic of the published sizes?"""
