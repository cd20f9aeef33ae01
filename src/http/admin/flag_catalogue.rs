//! Operations on environments, projects and flags, as found in the current snapshots.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    http::response::{self, HttpError, HttpResponse},
    protocol::{admin as wire, features::Feature},
    served::{ServedSnapshot, Snapshots},
};

/// The project that exists even without flags.
const DEFAULT_PROJECT: &str = "default";

/// The current snapshots, by the name of their environment.
#[derive(Debug)]
pub(super) struct FlagCatalogue(BTreeMap<String, Arc<ServedSnapshot>>);

impl FlagCatalogue {
    /// Takes the current snapshots.
    pub(super) fn from_snapshots(snapshots: &Snapshots) -> Self {
        let all = snapshots.all();
        let entry = |snapshot: &Arc<ServedSnapshot>| {
            (snapshot.environment().as_str().to_owned(), Arc::clone(snapshot))
        };
        Self(all.values().map(entry).collect())
    }

    /// Whether this environment exists.
    pub(super) fn has_environment(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The names of the environments.
    pub(super) fn environment_names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    /// Whether this project exists.
    pub(super) fn has_project(&self, id: &str) -> bool {
        id == DEFAULT_PROJECT || self.features().any(|feature| **feature.project() == *id)
    }

    /// Returns an error unless this project exists.
    pub(super) fn require_project(&self, id: &str) -> Result<(), HttpError> {
        let missing = || HttpError::ResourceNotFound("there is no such project".to_owned());
        self.has_project(id).then_some(()).ok_or_else(missing)
    }

    /// The ids of the projects.
    pub(super) fn project_ids(&self) -> Vec<String> {
        let of_flags = self.features().map(|feature| &**feature.project());
        let ids: BTreeSet<_> = of_flags.chain([DEFAULT_PROJECT]).collect();
        ids.into_iter().map(str::to_owned).collect()
    }

    fn features(&self) -> impl Iterator<Item = &Feature> {
        self.0.values().flat_map(|snapshot| snapshot.document().features())
    }

    /// Lists the environments.
    pub(super) fn list_environments(&self) -> HttpResponse {
        let environments =
            self.0.iter().enumerate().map(|(at, (name, snapshot))| wire::Environment {
                r#type: if name.starts_with("prod") { "production" } else { "development" },
                name: name.clone(),
                enabled: true,
                protected: false,
                sort_order: at + 1,
                total_toggle_count: snapshot.document().features().len(),
            });
        response::json_document(&wire::Environments {
            version: 1,
            environments: environments.collect(),
        })
    }

    /// Lists the projects.
    pub(super) fn list_projects(&self) -> HttpResponse {
        let mut flags: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        flags.entry(DEFAULT_PROJECT).or_default();
        for feature in self.features() {
            flags.entry(feature.project()).or_default().insert(feature.name());
        }
        let project = |(id, flags): (&str, BTreeSet<&str>)| wire::Project {
            id: id.to_owned(),
            name: id.to_owned(),
            feature_count: flags.len(),
        };
        let projects = flags.into_iter().map(project).collect();
        response::json_document(&wire::Projects { version: 1, projects })
    }

    /// Lists the flags of an environment.
    pub(super) fn list_flags(&self, environment: &str) -> Result<HttpResponse, HttpError> {
        let flags =
            self.find_environment(environment)?.document().features().iter().map(flag_summary);
        let environment = environment.to_owned();
        Ok(response::json_document(&wire::Flags { environment, flags: flags.collect() }))
    }

    /// Returns one flag of an environment, with its segments.
    pub(super) fn get_flag(
        &self,
        environment: &str,
        name: &str,
    ) -> Result<HttpResponse, HttpError> {
        let document = self.find_environment(environment)?.document();
        let feature = document
            .feature(name)
            .ok_or_else(|| HttpError::ResourceNotFound("there is no such flag".to_owned()))?;
        let parse = |raw: &str| serde_json::from_str(raw).unwrap_or(Value::Null);
        let segments = feature.segment_ids().iter().filter_map(|id| document.segment(*id));
        Ok(response::json_document(&wire::FlagDetail {
            environment: environment.to_owned(),
            flag: parse(feature.raw()),
            segments: segments.map(|segment| parse(segment.raw())).collect(),
        }))
    }

    fn find_environment(&self, environment: &str) -> Result<&ServedSnapshot, HttpError> {
        let missing = || HttpError::ResourceNotFound("there is no such environment".to_owned());
        self.0.get(environment).map(|snapshot| &**snapshot).ok_or_else(missing)
    }
}

/// Summarizes a flag. A flag that cannot be parsed has only its name and project.
fn flag_summary(feature: &Feature) -> wire::FlagSummary {
    let parsed: Value = serde_json::from_str(feature.raw()).unwrap_or(Value::Null);
    let text = |name: &str| parsed[name].as_str().map(str::to_owned);
    let is = |name: &str| parsed[name].as_bool().unwrap_or(false);
    let count = |name: &str| parsed[name].as_array().map_or(0, Vec::len);
    wire::FlagSummary {
        name: feature.name().to_string(),
        r#type: text("type"),
        project: feature.project().to_string(),
        enabled: is("enabled"),
        stale: is("stale"),
        description: text("description"),
        strategies: count("strategies"),
        variants: count("variants"),
        impression_data: is("impressionData"),
    }
}
