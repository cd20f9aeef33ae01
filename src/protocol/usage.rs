//! Registrations and usage reports of SDKs and edges, and the shapes that upstream accepts.
//!
//! Parsing is as lenient as the Unleash server (7.5.1, 8.2.0) and in places more so: a report that the
//! server would store is never rejected. Serialization is strict: only shapes that pass both schemas of
//! the server, because one invalid item makes it reject the whole request (protocol: `/metrics/bulk`).
//!
//! Usage is merged, bounded and sent in `usage`, not here.

mod impact_metrics;
mod object_reader;

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value};

use self::object_reader::{ObjectReader, lenient_text, parse_items};
pub use self::{
    impact_metrics::{HistogramSample, ImpactMetric, Labels, NumericSample, Samples, UpperBound},
    object_reader::{MAX_INTEGER, MAX_NUMBER, ParseError},
};

/// The maximum length of a metadata field, in bytes (upstream: `varchar(255)`); longer ones are
/// truncated.
const MAX_TEXT_BYTES: usize = 255;
/// The maximum number of strategies of a registration; further ones are ignored.
const MAX_STRATEGIES: usize = 256;
/// The maximum number of hops in `connectVia`; further ones are ignored.
const MAX_HOPS: usize = 16;
/// The maximum size of all unknown fields of a registration, in bytes of JSON.
const MAX_EXTRA_BYTES: usize = 4096;

/// The kind of an SDK.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum SdkKind {
    /// Server-side SDKs, which evaluate flags themselves.
    Backend,
    /// Frontend SDKs, which receive evaluated flags.
    Frontend,
}

impl SdkKind {
    /// The value of `sdkType`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Backend => "backend",
            Self::Frontend => "frontend",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "backend" => Some(Self::Backend),
            "frontend" => Some(Self::Frontend),
            _ => None,
        }
    }
}

/// The metadata of an SDK.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SdkMetadata {
    /// `<sdk>:<version>`.
    pub sdk_version: Option<Arc<str>>,
    /// The version of its Yggdrasil engine.
    pub yggdrasil_version: Option<Arc<str>>,
    /// The platform that it runs on.
    pub platform_name: Option<Arc<str>>,
    /// The version of the platform.
    pub platform_version: Option<Arc<str>>,
    /// The wrapper around it, such as that of a web framework.
    pub sdk_flavor: Option<Arc<str>>,
    /// The version of that wrapper.
    pub sdk_flavor_version: Option<Arc<str>>,
    /// The version of the client specification that it implements.
    pub spec_version: Option<Arc<str>>,
}

impl SdkMetadata {
    /// The values of the fields that are set.
    pub fn values(&self) -> impl Iterator<Item = &Arc<str>> {
        self.fields().into_iter().filter_map(|(_, text)| text.as_ref())
    }

    fn from_object(object: &mut ObjectReader) -> Self {
        Self {
            sdk_version: object.optional_text("sdkVersion", MAX_TEXT_BYTES),
            yggdrasil_version: object.optional_text("yggdrasilVersion", MAX_TEXT_BYTES),
            platform_name: object.optional_text("platformName", MAX_TEXT_BYTES),
            platform_version: object.optional_text("platformVersion", MAX_TEXT_BYTES),
            sdk_flavor: object.optional_text("sdkFlavor", MAX_TEXT_BYTES),
            sdk_flavor_version: object.optional_text("sdkFlavorVersion", MAX_TEXT_BYTES),
            spec_version: object.optional_text("specVersion", MAX_TEXT_BYTES),
        }
    }

    fn fields(&self) -> [(&'static str, &Option<Arc<str>>); 7] {
        [
            ("sdkVersion", &self.sdk_version),
            ("yggdrasilVersion", &self.yggdrasil_version),
            ("platformName", &self.platform_name),
            ("platformVersion", &self.platform_version),
            ("sdkFlavor", &self.sdk_flavor),
            ("sdkFlavorVersion", &self.sdk_flavor_version),
            ("specVersion", &self.spec_version),
        ]
    }

    /// Serializes the fields that are set; upstream rejects `null` for a string.
    fn write<M: SerializeMap>(&self, map: &mut M) -> Result<(), M::Error> {
        for (name, value) in self.fields() {
            serialize_some(map, name, value.as_deref())?;
        }
        Ok(())
    }
}

/// One hop between an application and upstream.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConnectVia {
    /// The name of the program.
    pub app_name: Arc<str>,
    /// The instance of the program.
    pub instance_id: Arc<str>,
}

impl Serialize for ConnectVia {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("appName", &*self.app_name)?;
        map.serialize_entry("instanceId", &*self.instance_id)?;
        map.end()
    }
}

/// The registration of an instance of an application.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientApplication {
    /// The name of the application; never empty.
    pub app_name: Arc<str>,
    /// The instance; upstream requires it in bulk reports.
    pub instance_id: Option<Arc<str>>,
    /// The connection; an instance may have several.
    pub connection_id: Option<Arc<str>>,
    /// The environment. It is determined by the token, not by the application.
    pub environment: Option<Arc<str>>,
    /// The projects. They are determined by the token too.
    pub projects: Option<Vec<Arc<str>>>,
    /// The edges between the application and this one, the nearest last.
    pub connect_via: Vec<ConnectVia>,
    /// The polling interval, in the unit of its SDK (seconds or milliseconds).
    pub interval: u64,
    /// The time when it started.
    pub started: Timestamp,
    /// The strategies that it implements, if it has listed them. Unleash stores an empty list as the
    /// list of the application. Unleash Edge requires a list, Unleash does not.
    pub strategies: Option<Vec<Arc<str>>>,
    /// The kind of its SDK.
    pub sdk_kind: Option<SdkKind>,
    /// The metadata of its SDK.
    pub metadata: SdkMetadata,
    /// Unknown fields, forwarded unchanged.
    pub extra: Map<String, Value>,
}

impl ClientApplication {
    /// Parses the body of a registration.
    pub fn parse(body: &[u8]) -> Result<Self, ParseError> {
        Self::from_object(ObjectReader::parse(body)?)
    }

    /// Parses a registration that is part of a larger body.
    pub fn from_value(value: Value) -> Result<Self, ParseError> {
        Self::from_object(ObjectReader::from_value(value, String::new())?)
    }

    fn from_object(mut object: ObjectReader) -> Result<Self, ParseError> {
        let app_name = object.required_text("appName")?;
        let started = object.timestamp("started")?;
        let interval = object.required_count("interval")?.min(MAX_INTEGER);
        let strategies = object.array("strategies")?;
        let projects = object.array("projects")?.map(|values| parse_texts(&values, MAX_STRATEGIES));
        let hops = object.array("connectVia")?.unwrap_or_default();
        let mut application = Self {
            app_name,
            started,
            interval,
            strategies: strategies.map(|values| parse_texts(&values, MAX_STRATEGIES)),
            projects,
            connect_via: hops.into_iter().filter_map(parse_hop).take(MAX_HOPS).collect(),
            instance_id: object.optional_text("instanceId", MAX_TEXT_BYTES),
            connection_id: object.optional_text("connectionId", MAX_TEXT_BYTES),
            environment: object.optional_text("environment", MAX_TEXT_BYTES),
            sdk_kind: object
                .optional_text("sdkType", MAX_TEXT_BYTES)
                .and_then(|kind| SdkKind::parse(&kind)),
            metadata: SdkMetadata::from_object(&mut object),
            extra: Map::new(),
        };
        // Upstream's schema has a type for this field too, and rejects anything but a string.
        if object.has("project") {
            let project = object.optional_text("project", MAX_TEXT_BYTES);
            application.extra.extend(project.map(|id| ("project".to_owned(), Value::from(&*id))));
        }
        let rest = object.into_remaining();
        if serde_json::to_vec(&rest).is_ok_and(|json| json.len() <= MAX_EXTRA_BYTES) {
            application.extra.extend(rest);
        }
        Ok(application)
    }
}

impl Serialize for ClientApplication {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("appName", &*self.app_name)?;
        serialize_some(&mut map, "instanceId", self.instance_id.as_deref())?;
        serialize_some(&mut map, "connectionId", self.connection_id.as_deref())?;
        serialize_some(&mut map, "environment", self.environment.as_deref())?;
        serialize_some(&mut map, "projects", self.projects.as_ref())?;
        map.serialize_entry("connectVia", &self.connect_via)?;
        map.serialize_entry("interval", &self.interval)?;
        map.serialize_entry("started", &self.started.to_string())?;
        serialize_some(&mut map, "strategies", self.strategies.as_ref())?;
        serialize_some(&mut map, "sdkType", self.sdk_kind.map(SdkKind::as_str))?;
        self.metadata.write(&mut map)?;
        for (name, value) in &self.extra {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// The counts of a flag: evaluations to on, to off, and to each variant.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ToggleStats {
    /// The number of evaluations to on.
    pub yes: u64,
    /// The number of evaluations to off.
    pub no: u64,
    /// The number of evaluations to each variant.
    pub variants: BTreeMap<Arc<str>, u64>,
}

impl ToggleStats {
    fn from_object(object: &mut ObjectReader) -> Result<Self, ParseError> {
        let mut stats =
            Self { yes: object.count("yes")?, no: object.count("no")?, ..Self::default() };
        for (name, count) in object.entries("variants")? {
            let path = || object.path(&format!("variants.{name}"));
            stats
                .variants
                .insert(name.as_str().into(), object_reader::parse_count(Some(&count), path)?);
        }
        Ok(stats)
    }
}

/// The counts of a period.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    /// The start of the period.
    pub start: Timestamp,
    /// The end of the period.
    pub stop: Option<Timestamp>,
    /// The counts by flag.
    pub toggles: Vec<(Arc<str>, ToggleStats)>,
}

impl Bucket {
    /// The time that determines the hour of the counts. As in Unleash, it is the end of the period.
    pub fn counted_at(&self) -> Timestamp {
        self.stop.unwrap_or(self.start)
    }
}

/// An SDK's usage report.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientMetrics {
    /// The name of the application; never empty.
    pub app_name: Arc<str>,
    /// The instance.
    pub instance_id: Option<Arc<str>>,
    /// The connection; an instance may have several.
    pub connection_id: Option<Arc<str>>,
    /// The counts; `None` if the SDK reports only impact metrics.
    pub bucket: Option<Bucket>,
    /// The impact metrics; malformed ones are ignored, as by upstream.
    pub impact_metrics: Vec<ImpactMetric>,
    /// The metadata of the SDK.
    pub metadata: SdkMetadata,
}

impl ClientMetrics {
    /// Parses the body of a usage report.
    pub fn parse(body: &[u8]) -> Result<Self, ParseError> {
        let mut object = ObjectReader::parse(body)?;
        let bucket = match object.take("bucket") {
            None => None,
            Some(bucket) => {
                let mut bucket = ObjectReader::from_value(bucket, object.path("bucket"))?;
                let start = bucket.timestamp("start")?;
                // An unreadable end is no error: the start determines the hour then.
                let stop = bucket.timestamp("stop").ok();
                let mut toggles = Vec::new();
                for (name, stats) in bucket.entries("toggles")? {
                    let path = bucket.path(&format!("toggles.{name}"));
                    let stats =
                        ToggleStats::from_object(&mut ObjectReader::from_value(stats, path)?)?;
                    toggles.push((name.into(), stats));
                }
                Some(Bucket { start, stop, toggles })
            }
        };
        Ok(Self {
            app_name: object.required_text("appName")?,
            instance_id: object.optional_text("instanceId", MAX_TEXT_BYTES),
            connection_id: object.optional_text("connectionId", MAX_TEXT_BYTES),
            bucket,
            impact_metrics: impact_metrics::parse_list(object.take("impactMetrics")).0,
            metadata: SdkMetadata::from_object(&mut object),
        })
    }
}

/// A counter of a bulk report: the usage of a flag by one application in one hour.
#[derive(Clone, Debug, PartialEq)]
pub struct BulkMetric {
    /// The name of the flag.
    pub feature_name: Arc<str>,
    /// The name of the application.
    pub app_name: Arc<str>,
    /// The environment.
    pub environment: Arc<str>,
    /// A time within the hour.
    pub timestamp: Timestamp,
    /// The counts.
    pub stats: ToggleStats,
    /// The metadata of the SDK that reported last; upstream does not store it.
    pub metadata: SdkMetadata,
}

impl BulkMetric {
    /// Parses a counter that is part of a larger body.
    pub fn from_value(value: Value) -> Result<Self, ParseError> {
        let mut object = ObjectReader::from_value(value, String::new())?;
        Ok(Self {
            feature_name: object.required_text("featureName")?,
            app_name: object.required_text("appName")?,
            environment: object.required_text("environment")?,
            timestamp: object.timestamp("timestamp")?,
            stats: ToggleStats::from_object(&mut object)?,
            metadata: SdkMetadata::from_object(&mut object),
        })
    }
}

impl Serialize for BulkMetric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("featureName", &*self.feature_name)?;
        map.serialize_entry("appName", &*self.app_name)?;
        map.serialize_entry("environment", &*self.environment)?;
        map.serialize_entry("timestamp", &self.timestamp.to_string())?;
        map.serialize_entry("yes", &self.stats.yes)?;
        map.serialize_entry("no", &self.stats.no)?;
        map.serialize_entry("variants", &self.stats.variants)?;
        self.metadata.write(&mut map)?;
        map.end()
    }
}

/// The header with the id of a bulk report, which is the same in each attempt to send the report. Parapet
/// sends it and recognises repeated reports by it; Unleash and Unleash Edge ignore it.
pub const BATCH_ID_HEADER: &str = "idempotency-key";

/// The report of another edge about the SDKs behind it.
#[derive(Clone, Debug, PartialEq)]
pub struct BulkReport {
    /// The registrations.
    pub applications: Vec<ClientApplication>,
    /// The counts.
    pub metrics: Vec<BulkMetric>,
    /// The impact metrics.
    pub impact_metrics: Vec<ImpactMetric>,
    /// The number of malformed items, which were skipped.
    pub malformed: usize,
}

impl BulkReport {
    /// Parses the body of a bulk report.
    pub fn parse(body: &[u8]) -> Result<Self, ParseError> {
        let mut object = ObjectReader::parse(body)?;
        let applications = object.required_array("applications")?;
        let metrics = object.required_array("metrics")?;
        let (applications, bad_applications) =
            parse_items(applications, ClientApplication::from_value);
        let (metrics, bad_metrics) = parse_items(metrics, BulkMetric::from_value);
        let (impact_metrics, bad_impact_metrics) =
            impact_metrics::parse_list(object.take("impactMetrics"));
        let malformed = bad_applications + bad_metrics + bad_impact_metrics;
        Ok(Self { applications, metrics, impact_metrics, malformed })
    }
}

/// The instance data of an edge. Only the identifier is parsed; the rest is kept unchanged.
#[derive(Clone, Debug, PartialEq)]
pub struct EdgeInstance {
    identifier: Arc<str>,
    value: Value,
}

impl EdgeInstance {
    /// Parses the instance data of an edge.
    pub fn parse(body: &[u8]) -> Result<Self, ParseError> {
        let mut object = ObjectReader::parse(body)?;
        let identifier = object.required_text("identifier")?;
        let mut fields = object.into_remaining();
        fields.insert("identifier".to_owned(), Value::from(&*identifier));
        Ok(Self { identifier, value: Value::Object(fields) })
    }

    /// The identifier that the edge has chosen.
    pub fn identifier(&self) -> &Arc<str> {
        &self.identifier
    }

    /// The whole instance data.
    pub fn value(&self) -> &Value {
        &self.value
    }
}

/// The non-empty strings in `values`; upstream rejects empty ones and other types.
fn parse_texts(values: &[Value], limit: usize) -> Vec<Arc<str>> {
    values.iter().filter_map(|value| lenient_text(value, MAX_TEXT_BYTES)).take(limit).collect()
}

fn parse_hop(value: Value) -> Option<ConnectVia> {
    let mut object = ObjectReader::from_value(value, String::new()).ok()?;
    Some(ConnectVia {
        app_name: object.optional_text("appName", MAX_TEXT_BYTES)?,
        instance_id: object.optional_text("instanceId", MAX_TEXT_BYTES)?,
    })
}

fn serialize_some<M: SerializeMap, T: Serialize>(
    map: &mut M,
    name: &'static str,
    value: Option<T>,
) -> Result<(), M::Error> {
    match value {
        Some(value) => map.serialize_entry(name, &value),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(body: &str) -> Result<ClientMetrics, String> {
        ClientMetrics::parse(body.as_bytes()).map_err(|error| error.to_string())
    }

    fn bucket(toggles: &str) -> String {
        format!(
            r#"{{"appName":"a","bucket":{{"start":"2026-01-02T03:04:05Z",
            "stop":"2026-01-02T04:04:05Z","toggles":{toggles}}}}}"#
        )
    }

    #[track_caller]
    fn check_counts(stats: &str, yes: u64, no: u64, variants: &[(&str, u64)]) {
        let report = metrics(&bucket(&format!(r#"{{"f":{stats}}}"#))).expect(stats);
        let variants = variants.iter().map(|(name, count)| (Arc::from(*name), *count)).collect();
        let expected = ToggleStats { yes, no, variants };
        assert_eq!(report.bucket.unwrap().toggles, [(Arc::from("f"), expected)], "{stats}");
    }

    #[test]
    fn counts_are_parsed_as_leniently_as_by_the_server() {
        check_counts(r#"{"yes":3,"no":4,"variants":{"a":1}}"#, 3, 4, &[("a", 1)]);
        check_counts("{}", 0, 0, &[]);
        check_counts(r#"{"yes":"7","no":"","variants":null}"#, 7, 0, &[]);
        check_counts(r#"{"yes":1.0,"no":null,"variants":[]}"#, 1, 0, &[]);
        check_counts(r#"{"yes":18446744073709551615}"#, u64::MAX, 0, &[]);
    }

    #[test]
    fn error_names_the_field_and_does_not_repeat_the_body() {
        let check = |body: &str, message: &str| {
            assert_eq!(metrics(body).unwrap_err(), message, "{body}");
        };
        check("{", "the body is not JSON");
        check("[]", "the body is not an object");
        check("{}", "`appName` is missing");
        check(r#"{"appName":""}"#, "`appName` is empty");
        check(r#"{"appName":["secret"]}"#, "`appName` is not a text");
        check(r#"{"appName":"a","bucket":{}}"#, "`bucket.start` is missing");
        check(r#"{"appName":"a","bucket":{"start":"x"}}"#, "`bucket.start` is not a time");
        check(&bucket(r#"{"f":{"yes":-1}}"#), "`bucket.toggles.f.yes` is not a count");
        check(
            &bucket(r#"{"f":{"variants":{"v":"x"}}}"#),
            "`bucket.toggles.f.variants.v` is not a count",
        );
        check(&bucket(r#"{"f":3}"#), "`bucket.toggles.f` is not an object");
        let long = metrics(&bucket(&format!(r#"{{"{}":3}}"#, "é".repeat(9000)))).unwrap_err();
        assert!(long.len() < 200, "{long}");
    }

    #[test]
    fn times_are_rfc_3339_or_milliseconds_and_small_numbers_are_seconds() {
        let check = |start: &str| {
            let body = format!(r#"{{"appName":"a","bucket":{{"start":{start},"toggles":{{}}}}}}"#);
            let start = metrics(&body).expect(&body).bucket.unwrap().start;
            assert_eq!(start.to_string(), "2023-07-27T11:24:09Z", "{body}");
        };
        check(r#""2023-07-27T11:24:09Z""#);
        check(r#""2023-07-27T13:24:09+02:00""#);
        check(r#""2023-07-27T11:24:09""#);
        check("1690457049000");
        check("1690457049");
        check(r#""1690457049000""#);
    }

    #[test]
    fn counts_belong_to_the_end_of_their_bucket() {
        let check = |bucket: &str, expected: &str| {
            let body = format!(r#"{{"appName":"a","bucket":{{{bucket},"toggles":{{}}}}}}"#);
            let bucket = metrics(&body).expect(&body).bucket.unwrap();
            assert_eq!(bucket.counted_at().to_string(), expected, "{body}");
        };
        let start = r#""start":"2026-01-02T07:59:30Z""#;
        let with_stop = |stop: &str| format!(r#"{start},"stop":{stop}"#);
        check(&with_stop(r#""2026-01-02T08:00:30Z""#), "2026-01-02T08:00:30Z");
        check(&with_stop(r#""2026-01-02T04:00:00Z""#), "2026-01-02T04:00:00Z");
        check(&with_stop("1767340830000"), "2026-01-02T08:00:30Z");
        for unreadable in [r#""later""#, r#""""#, "null", "[]"] {
            check(&with_stop(unreadable), "2026-01-02T07:59:30Z");
        }
        check(start, "2026-01-02T07:59:30Z");
    }

    #[test]
    fn registration_preserves_unknown_fields_and_omits_values_that_upstream_rejects() {
        let check = |body: &str, expected: &str| {
            let application = ClientApplication::parse(body.as_bytes()).expect(body);
            assert_eq!(serde_json::to_string(&application).unwrap(), expected);
        };
        let started = "2026-01-02T03:04:05Z";
        check(
            &format!(
                r#"{{"appName":"a","instanceId":"i","started":"{started}","interval":15,
                "strategies":["default",3,"",null],"sdkVersion":"x:1","sdkType":"frontend",
                "connectVia":[{{"appName":"edge","instanceId":"e"}}],"novel":{{"x":[1]}}}}"#
            ),
            &format!(
                r#"{{"appName":"a","instanceId":"i","connectVia":[{{"appName":"edge","instanceId":"e"}}],"interval":15,"started":"{started}","strategies":["default","3"],"sdkType":"frontend","sdkVersion":"x:1","novel":{{"x":[1]}}}}"#
            ),
        );
        check(
            &format!(
                r#"{{"appName":"a","started":"{started}","interval":"15","sdkVersion":"",
                "platformName":null,"sdkType":"toaster","project":{{}},"big":"{}"}}"#,
                "x".repeat(MAX_EXTRA_BYTES)
            ),
            &format!(r#"{{"appName":"a","connectVia":[],"interval":15,"started":"{started}"}}"#),
        );
    }

    #[test]
    fn malformed_items_of_a_bulk_report_are_skipped() {
        let body = r#"{"applications":[{"appName":""}],"seenTokens":["*:d.x"],"metrics":[
            {"featureName":"f","appName":"a","environment":"d","timestamp":"2026-01-02T03:00:00Z","yes":2},
            {"featureName":"f"}],"impactMetrics":[{"name":"x"}]}"#;
        let bulk = BulkReport::parse(body.as_bytes()).unwrap();
        assert_eq!(bulk.malformed, 3);
        assert_eq!(
            serde_json::to_string(&bulk.metrics).unwrap(),
            r#"[{"featureName":"f","appName":"a","environment":"d","timestamp":"2026-01-02T03:00:00Z","yes":2,"no":0,"variants":{}}]"#
        );
        assert_eq!(BulkReport::parse(b"{}").unwrap_err().to_string(), "`applications` is missing");
    }
}
