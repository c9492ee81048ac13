"""Does the quickstart's mixture of experts beat the dense model of the same active FLOPs?"""
