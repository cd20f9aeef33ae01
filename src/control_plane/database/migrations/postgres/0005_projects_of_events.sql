-- The projects that events concern, one by one: `events.project` has them with commas between, in which
-- no index finds one. Written by a trigger, so that it follows from the events alone.
CREATE TABLE event_projects (
    project TEXT NOT NULL,
    event_id BIGINT NOT NULL REFERENCES events (id) ON DELETE CASCADE,
    PRIMARY KEY (project, event_id)
);
CREATE INDEX event_projects_by_event ON event_projects (event_id);

CREATE FUNCTION add_event_projects() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO event_projects (project, event_id)
    SELECT DISTINCT unnest(string_to_array(NEW.project, ',')), NEW.id;
    RETURN NULL;
END
$$;
CREATE TRIGGER event_projects_of_new AFTER INSERT ON events
FOR EACH ROW WHEN (NEW.project IS NOT NULL) EXECUTE FUNCTION add_event_projects();

INSERT INTO event_projects (project, event_id)
SELECT DISTINCT unnest(string_to_array(project, ',')), id FROM events WHERE project IS NOT NULL;
