//! The control plane on SQLite and on PostgreSQL, in this process: every story on both.

mod bed;
mod people;
mod records;
mod several;
mod tokens;

/// Makes a test for each database of stories that take an empty one.
macro_rules! on_both {
    ($($story:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test]
                async fn $story() {
                    super::$story(crate::database::bed::Bed::sqlite()).await;
                }
            )+
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread")]
                #[ignore = "needs PostgreSQL"]
                async fn $story() {
                    super::$story(crate::database::bed::Bed::postgres().await).await;
                }
            )+
        }
    };
}
use on_both;
