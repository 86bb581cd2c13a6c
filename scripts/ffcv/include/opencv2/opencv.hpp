// Found before OpenCV's own header of this name, which includes modules that are not installed.
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
