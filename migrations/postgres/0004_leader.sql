-- Where the scheduler is reached that leads, so that those which follow pass on to it what they do not answer themselves; and the word by
-- which it knows that a call comes from one of them. Empty until it has said so, and when it has ended in good order.

ALTER TABLE terms ADD COLUMN leader TEXT NOT NULL DEFAULT '';
ALTER TABLE terms ADD COLUMN word TEXT NOT NULL DEFAULT '';
