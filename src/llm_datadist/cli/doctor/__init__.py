"""The verb `doctor`: will it be fast and safe here?"""
