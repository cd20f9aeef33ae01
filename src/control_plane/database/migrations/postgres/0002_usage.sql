-- Whether the flag or variant was in the configuration when its use was last stored, 0 or 1. What was
-- stored before counts as configured: it is not known.
ALTER TABLE flag_usage ADD COLUMN known BIGINT NOT NULL DEFAULT 1;
CREATE INDEX flag_usage_unknown ON flag_usage (hour) WHERE known = 0;

ALTER TABLE variant_usage ADD COLUMN known BIGINT NOT NULL DEFAULT 1;
CREATE INDEX variant_usage_unknown ON variant_usage (hour) WHERE known = 0;

-- The batches of usage that were stored lately: one that comes again is not counted again.
CREATE TABLE usage_batches (
    id TEXT NOT NULL PRIMARY KEY,
    stored_at BIGINT NOT NULL
);
CREATE INDEX usage_batches_by_time ON usage_batches (stored_at);
