//! Impact metrics: counters, gauges and histograms that applications define and SDKs report.

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use super::object_reader::{
    MAX_INTEGER, MAX_NUMBER, ObjectReader, ParseError, lenient_text, parse_items,
};

/// The maximum length of the name of a metric, and of the name or value of a label, in bytes.
const MAX_NAME_BYTES: usize = 255;
/// The maximum length of a help text, in bytes.
const MAX_HELP_BYTES: usize = 1024;
/// The maximum number of labels of a sample; further ones are ignored.
const MAX_LABELS: usize = 16;
/// The maximum number of buckets of a histogram; further ones are ignored.
const MAX_BUCKETS: usize = 256;

/// Labels and their values, none of them empty. Prometheus treats an empty label as absent, and
/// upstream's schema rejects it.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// A metric and its samples.
#[derive(Clone, Debug, PartialEq)]
pub struct ImpactMetric {
    /// The name of the metric.
    pub name: Arc<str>,
    /// The help text; never empty, because upstream would reject it.
    pub help: Arc<str>,
    /// The samples.
    pub samples: Samples,
}

/// The samples of a metric, by its type.
#[derive(Clone, Debug, PartialEq)]
pub enum Samples {
    /// Increments since the last report.
    Counter(Vec<NumericSample>),
    /// Current values.
    Gauge(Vec<NumericSample>),
    /// Observations since the last report.
    Histogram(Vec<HistogramSample>),
}

/// A value with its labels.
#[derive(Clone, Debug, PartialEq)]
pub struct NumericSample {
    /// The labels.
    pub labels: Labels,
    /// The value; finite.
    pub value: f64,
}

/// Observations with their labels.
#[derive(Clone, Debug, PartialEq)]
pub struct HistogramSample {
    /// The labels.
    pub labels: Labels,
    /// The number of observations.
    pub count: u64,
    /// The sum of the observations; finite.
    pub sum: f64,
    /// The number of observations less than or equal to each bound.
    pub buckets: BTreeMap<UpperBound, u64>,
}

/// The upper bound of a histogram's bucket: a number or infinity, never `NaN`.
#[derive(Clone, Copy, Debug)]
pub struct UpperBound(f64);

impl UpperBound {
    fn parse(value: &Value) -> Option<Self> {
        let bound = match value {
            Value::Number(number) => number.as_f64().filter(|bound| bound.abs() <= MAX_NUMBER)?,
            Value::String(text) => match text.trim() {
                "+Inf" | "Inf" => f64::INFINITY,
                text => text.parse().ok().filter(|bound: &f64| bound.abs() <= MAX_NUMBER)?,
            },
            _ => return None,
        };
        // Adding zero turns -0 into 0, so that both are the same bound.
        Some(Self(bound + 0.0))
    }
}

impl Ord for UpperBound {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for UpperBound {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for UpperBound {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for UpperBound {}

impl Serialize for UpperBound {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_infinite() {
            serializer.serialize_str("+Inf")
        } else {
            serializer.serialize_f64(self.0)
        }
    }
}

/// Parses a list of metrics; also returns the number of malformed ones, which are skipped.
pub(super) fn parse_list(value: Option<Value>) -> (Vec<ImpactMetric>, usize) {
    match value {
        None => (Vec::new(), 0),
        Some(Value::Array(values)) => parse_items(values, ImpactMetric::from_value),
        Some(_) => (Vec::new(), 1),
    }
}

impl ImpactMetric {
    /// Parses a metric that is part of a larger body.
    pub fn from_value(value: Value) -> Result<Self, ParseError> {
        let mut object = ObjectReader::from_value(value, String::new())?;
        let missing = |path: &str| ParseError::Missing { path: path.to_owned() };
        let name = object.optional_text("name", MAX_NAME_BYTES).ok_or_else(|| missing("name"))?;
        let help =
            object.optional_text("help", MAX_HELP_BYTES).unwrap_or_else(|| Arc::clone(&name));
        let kind = object.required_text("type")?;
        let samples = object.required_array("samples")?;
        let samples = match &*kind {
            // A negative increment would make upstream drop the whole list.
            "counter" => Samples::Counter(parse_samples(samples, |sample| {
                parse_numeric_sample(sample).filter(|sample| sample.value >= 0.0)
            })),
            "gauge" => Samples::Gauge(parse_samples(samples, parse_numeric_sample)),
            "histogram" => Samples::Histogram(parse_samples(samples, parse_histogram_sample)),
            _ => {
                let path = "type".to_owned();
                return Err(ParseError::WrongType {
                    path,
                    expected: "counter, gauge or histogram",
                });
            }
        };
        Ok(Self { name, help, samples })
    }
}

fn parse_samples<T>(samples: Vec<Value>, read: impl Fn(ObjectReader) -> Option<T>) -> Vec<T> {
    let objects = samples
        .into_iter()
        .filter_map(|sample| ObjectReader::from_value(sample, String::new()).ok());
    objects.filter_map(read).collect()
}

fn parse_numeric_sample(mut object: ObjectReader) -> Option<NumericSample> {
    Some(NumericSample {
        value: bounded_number(&mut object, "value")?,
        labels: parse_labels(&mut object),
    })
}

fn parse_histogram_sample(mut object: ObjectReader) -> Option<HistogramSample> {
    let mut buckets = BTreeMap::new();
    for bucket in object.required_array("buckets").ok()?.into_iter().take(MAX_BUCKETS) {
        let mut bucket = ObjectReader::from_value(bucket, String::new()).ok()?;
        let bound = UpperBound::parse(&bucket.take("le")?)?;
        buckets.insert(bound, bucket.required_count("count").ok()?.min(MAX_INTEGER));
    }
    Some(HistogramSample {
        count: object.required_count("count").ok()?.min(MAX_INTEGER),
        sum: bounded_number(&mut object, "sum")?,
        buckets,
        labels: parse_labels(&mut object),
    })
}

fn bounded_number(object: &mut ObjectReader, name: &str) -> Option<f64> {
    object.number(name).ok().filter(|number| number.abs() <= MAX_NUMBER)
}

fn parse_labels(object: &mut ObjectReader) -> Labels {
    let entries = object.entries("labels").unwrap_or_default();
    let texts = entries.iter().filter_map(|(name, value)| {
        let fits = !name.is_empty() && name.len() <= MAX_NAME_BYTES;
        fits.then(|| Some((name.as_str().into(), lenient_text(value, MAX_NAME_BYTES)?)))?
    });
    texts.take(MAX_LABELS).collect()
}

impl Serialize for ImpactMetric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(4))?;
        map.serialize_entry("name", &*self.name)?;
        map.serialize_entry("help", &*self.help)?;
        match &self.samples {
            Samples::Counter(samples) => {
                map.serialize_entry("type", "counter")?;
                map.serialize_entry("samples", samples)?;
            }
            Samples::Gauge(samples) => {
                map.serialize_entry("type", "gauge")?;
                map.serialize_entry("samples", samples)?;
            }
            Samples::Histogram(samples) => {
                map.serialize_entry("type", "histogram")?;
                map.serialize_entry("samples", samples)?;
            }
        }
        map.end()
    }
}

impl Serialize for NumericSample {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("value", &self.value)?;
        map.serialize_entry("labels", &self.labels)?;
        map.end()
    }
}

impl Serialize for HistogramSample {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(serde::Serialize)]
        struct Bucket {
            le: UpperBound,
            count: u64,
        }
        let buckets: Vec<_> =
            self.buckets.iter().map(|(&le, &count)| Bucket { le, count }).collect();
        let mut map = serializer.serialize_map(Some(4))?;
        map.serialize_entry("count", &self.count)?;
        map.serialize_entry("sum", &self.sum)?;
        map.serialize_entry("buckets", &buckets)?;
        map.serialize_entry("labels", &self.labels)?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, expected: Option<&str>) {
        let metric = ImpactMetric::from_value(serde_json::from_str(json).unwrap()).ok();
        let written = metric.map(|metric| serde_json::to_string(&metric).unwrap());
        assert_eq!(written.as_deref(), expected, "{json}");
    }

    #[test]
    fn metrics_are_serialized_in_the_shape_that_upstream_accepts() {
        check(
            r#"{"name":"n","help":"","type":"counter","samples":[{"value":2,"labels":{"a":7,"b":"","c":"x"}},{"value":-1}]}"#,
            Some(
                r#"{"name":"n","help":"n","type":"counter","samples":[{"value":2.0,"labels":{"a":"7","c":"x"}}]}"#,
            ),
        );
        check(
            r#"{"name":"n","help":"h","type":"gauge","samples":[{"value":-1.5}]}"#,
            Some(
                r#"{"name":"n","help":"h","type":"gauge","samples":[{"value":-1.5,"labels":{}}]}"#,
            ),
        );
        check(
            r#"{"name":"n","help":"h","type":"histogram","samples":[{"count":3,"sum":1.5,"buckets":[{"le":"+Inf","count":3},{"le":0.5,"count":1}]}]}"#,
            Some(
                r#"{"name":"n","help":"h","type":"histogram","samples":[{"count":3,"sum":1.5,"buckets":[{"le":0.5,"count":1},{"le":"+Inf","count":3}],"labels":{}}]}"#,
            ),
        );
        check(r#"{"name":"n","help":"h","type":"toaster","samples":[]}"#, None);
        check(r#"{"name":"","help":"h","type":"gauge","samples":[]}"#, None);
    }
}
