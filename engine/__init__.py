"""What any training needs; knows neither datasets nor the network."""
