"""Attacks and statistical audits on the code that hospitals run: would a broken promise be noticed?"""
