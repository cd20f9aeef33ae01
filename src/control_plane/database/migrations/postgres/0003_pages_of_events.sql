-- A page of filtered events is found without looking at those that do not fit.
CREATE INDEX events_by_kind ON events (kind, id);
CREATE INDEX events_by_author ON events (created_by, id);
CREATE INDEX events_by_environment ON events (environment, id);
