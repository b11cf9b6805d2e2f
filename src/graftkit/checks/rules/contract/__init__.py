"""What every attached adapter owes: checked on the live model, or on its twin."""
