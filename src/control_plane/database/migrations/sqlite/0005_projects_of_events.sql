-- The projects that events concern, one by one: `events.project` has them with commas between, in which
-- no index finds one. Written by a trigger, so that it follows from the events alone.
CREATE TABLE event_projects (
    project TEXT NOT NULL,
    event_id INTEGER NOT NULL REFERENCES events (id) ON DELETE CASCADE,
    PRIMARY KEY (project, event_id)
) WITHOUT ROWID;
CREATE INDEX event_projects_by_event ON event_projects (event_id);

CREATE TRIGGER event_projects_of_new AFTER INSERT ON events WHEN NEW.project IS NOT NULL
BEGIN
    INSERT OR IGNORE INTO event_projects (project, event_id)
    SELECT value, NEW.id FROM json_each('[' || REPLACE(json_quote(NEW.project), ',', '","') || ']');
END;

INSERT OR IGNORE INTO event_projects (project, event_id)
SELECT value, events.id
FROM events, json_each('[' || REPLACE(json_quote(events.project), ',', '","') || ']')
WHERE events.project IS NOT NULL;
